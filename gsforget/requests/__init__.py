"""Requests in every shape in which they come: classes, lists of images, and files that hold several in order."""

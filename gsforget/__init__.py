"""gsforget: make a trained vision transformer forget classes on request, show the evidence, ship the result.

Importing the package costs nothing: torch and its friends are loaded by the first function that needs them.
"""

__version__ = "0.1.0"

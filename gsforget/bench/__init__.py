"""Ways to forget side by side: the same model, images, requests, tuning budget and attacks for all (`gsforget bench`)."""

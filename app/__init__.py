"""The service: a trained model at work over HTTP, and the page on which a person asks it. No torch but in worker.py."""

"""The web server behind app.py."""

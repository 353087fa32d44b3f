"""Cases, masks, pictures and tables on disk."""

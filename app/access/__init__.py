"""Who may ask, and how much they used."""

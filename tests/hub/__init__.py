"""`push` and `fetch` with the real client of the Hub, against a small Hub that runs here."""

"""The Hub, whatever it holds: what is fetched from it, and its failures in our words."""

"""The Hub, whatever is there: what is fetched from it, and its failures in our words. No word of artefacts here."""

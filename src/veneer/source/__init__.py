"""Where stored bytes come from. A source is *unverified bytes by range*; verification is its callers' work."""

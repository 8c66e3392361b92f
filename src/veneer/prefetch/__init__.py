"""What starts read: profiles, the ranges that they touched, and packs, the bytes of these in one blob."""

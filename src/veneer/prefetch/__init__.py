"""What a start will read: profiles, the ranges that starts have touched, and packs, their bytes in that order."""

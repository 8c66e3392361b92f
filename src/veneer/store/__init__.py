"""Verified bytes of devices: fetched once, kept within a quota, shared by every mount of a machine."""

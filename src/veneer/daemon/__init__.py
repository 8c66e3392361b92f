"""The background process of a mount, and what commands need to start, find, ask and end it."""

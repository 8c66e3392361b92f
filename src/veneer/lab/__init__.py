"""The lab: images, networks, systems and statistics to measure what a start costs, and to compare."""

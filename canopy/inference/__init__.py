"""From an open source of imagery to a height map: which crops, how they blend, who reads and who writes."""

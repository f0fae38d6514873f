"""The local web map: height maps and their image in a browser, and the same as a folder for any web space."""

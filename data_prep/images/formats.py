"""Which image formats are taken."""

DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Pillow decoders that may see untrusted bytes (JPEG includes MPO); anything else is `not_an_image`, icons and SVG too."""

EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pnm"})
"""File names that are taken for images when a folder or a tar is listed."""

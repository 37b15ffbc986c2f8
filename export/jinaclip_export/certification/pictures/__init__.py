"""Generated pictures of many kinds, as inputs of a certificate. Imports numpy and Pillow only."""

"""What a lab is made from: the image, the Debian packages, the repositories and their keys.

Starting and stopping a lab is not here.
"""

"""The parts of a lab's outer node: the image, Debian packages, repositories and their keys.

Labs are started and stopped by `lab.lifecycle`.
"""

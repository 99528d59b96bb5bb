"""What the API's methods do, by the part of the tree they are in."""

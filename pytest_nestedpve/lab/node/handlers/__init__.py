"""The methods of the API, by their part of the tree."""

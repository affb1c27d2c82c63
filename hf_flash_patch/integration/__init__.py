"""The only folder that knows transformers' seams: its attention call, its mask request, its model
tree."""

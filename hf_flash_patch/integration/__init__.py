"""The only folder that knows transformers' seams: attention call, mask request, model tree."""

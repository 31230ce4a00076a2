"""The language model as a policy: where it comes from, how it is prompted, sampled, scored and written out."""

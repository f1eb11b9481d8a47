"""The steps of the study note: generate text, train a small model, trace its steps."""

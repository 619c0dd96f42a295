"""One model, one plan, no search: what ``autocompress export`` does, and how its result is checked again."""

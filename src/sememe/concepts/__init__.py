"""The idea as pure tensor code: which positions write a concept, which id, and who may see whom.

Shape suffixes: B batch · T tokens · C packed concepts (ragged, padded) · D width · K concept ids ·
Q/S query and key lanes."""

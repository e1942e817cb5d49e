"""The paper's comparisons as studies that run again: what is asked, which runs answer it, and what the answer is worth."""

"""Vision-language models whose image tokens leave on the way up."""

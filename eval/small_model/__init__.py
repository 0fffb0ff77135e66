"""A small DeepSeek-V3.2, trained by the report's recipe on data that this package makes."""

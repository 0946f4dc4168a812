"""Small programs around Scrip's API, to be copied and changed."""

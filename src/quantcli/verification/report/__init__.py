"""What a report looks like: a page, JUnit XML, words."""

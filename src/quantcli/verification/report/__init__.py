"""The forms of a report: a page, JUnit XML, words."""

"""Grading submissions: trusted code here, the student's code in a sandbox, bytes in between."""

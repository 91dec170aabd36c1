"""What is measured, described once: the page, the rules, the dashboard and the documentation come from `catalogue`."""

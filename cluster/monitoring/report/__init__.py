"""The HTML report: `report` reads the run and fills the page, `page_data` computes the values that the page shows."""

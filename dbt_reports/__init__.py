"""dbt marts over the lake and the Evidence site built from them."""

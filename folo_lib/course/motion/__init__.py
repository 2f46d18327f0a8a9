"""Figures that a reader moves by hand, one module for each page that has them.

    from folo_lib.course.motion.attention import drag_query

    drag_query(queries, keys, words)  # the last expression of a cell

Each function returns a `Motion`, which shows itself: HTML with a drawing, knobs and a small script
where scripts run, and the first state as a picture elsewhere. No kernel is needed and nothing is
fetched.
"""

def html(plans, price):
    return ""

def test_x(model):
    print(model)

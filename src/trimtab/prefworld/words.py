"""Word lists that several families share."""

NAMES = (
    "Tom Ana Ben Eve Max Lia Sam Zoe Leo Mia Ada Bob Cal Dan Ella Finn Gus Hana Ivan Jane Kim Lena Milo Nora Omar Pia "
    "Quinn Rosa Sven Tara Uma Vera Will Yara Zack Amir Bea Carl Dora Eli Faye Gina Hugo Ines Jack Kira Luke Maya Nils "
    "Olga Paul Rita Saul Tess Ugo Viola Wendy Xena Yusuf Zara"
).split()
OBJECTS = (
    "apples pens coins books eggs cards shells stamps pears plums nuts beads cups plates spoons keys rings buttons "
    "marbles stones sticks leaves roses tulips candles lamps chairs boots gloves scarves hats socks shirts toys dolls "
    "kites balls drums flutes bells maps letters photos stickers badges bricks tiles nails screws ropes lemons melons "
    "carrots onions beans cookies muffins loaves tickets bottles"
).split()
CONTAINERS = "boxes bags jars baskets crates trays packs tins sacks cases".split()
SORTABLE = (
    "apple arrow badge basin beach berry bread brick cabin camel candle carrot castle chain cloud coral daisy dance "
    "desert diamond eagle earth elbow engine fable farmer feather field forest garden ghost glove grape hammer harbor "
    "honey horse island ivory jacket jewel kettle king ladder lemon lion magnet maple meadow music needle night ocean "
    "olive orange paper peach pepper piano pillow queen quiet rabbit river robin saddle salmon shadow silver table "
    "tiger tower tulip uncle valley velvet violin wagon water window yellow zebra"
).split()

"""What the demo's page says, and the questions asked about it. Written for this demo; every name is invented."""

PAGE = """\
THE HARBOUR BULLETIN
News and notices for the people of Port Alder. Issue 214, Saturday 12 October.

FERRY. The winter timetable starts on Monday. The first boat to Gull Island leaves at 7:15 in the morning and the last \
one comes back at 18:40. A return ticket for the ferry costs 6 pounds. Bicycles travel free. The ferry is called the \
Morning Star and her captain is Ruth Okafor.

LIBRARY. The library in Chapel Street will be closed for repairs until 3 November, because the roof leaks. Books can \
be returned at the bakery next door. The librarian, Mr Tomas Lindqvist, asks readers to keep their books until then if \
they can. No fines will be charged.

SCHOOL. The children of the primary school have planted 240 apple trees on the hill behind the church. The head \
teacher, Mrs Amara Diallo, thanked the farmer Jack Penrose, who lent his tractor. The school play this year is \
Treasure Island, and tickets cost 2 pounds at the door.

MARKET. The fish market moves from the old quay to Station Square. It opens on Tuesdays and Fridays from 8 in the \
morning until noon. Cheese, honey and bread are sold there as well. Dogs must be kept on a lead.

WEATHER. A storm is expected on Wednesday night with winds of 90 kilometres an hour from the north west. Boat owners \
should double their ropes. The harbour master, Helen Brandt, can be reached by telephone at 555 0173 day and night.

LOST AND FOUND. A grey cat with one white paw was lost near the lighthouse on Sunday. Her name is Pepper. Please call \
Mrs Novak at the post office. A silver watch was found on the beach; the owner can collect it at the police station.

MUSIC. The brass band plays in the park on Sunday at three in the afternoon. The conductor is Daniel Reyes, who also \
teaches the trumpet. If it rains, the concert takes place in the town hall. Admission is free, and tea will be served.

FOOTBALL. Port Alder beat Kingsmouth by three goals to one. Two goals were scored by Sam Whitlock, the third by the \
goalkeeper with a kick from his own half. The next match is away, against Brackenford, on 19 October.

HEALTH. Doctor Elena Vasquez gives vaccinations against influenza at the health centre every Thursday afternoon. \
People over 65 pay nothing. The pharmacy stays open until nine in the evening this week.

MUSEUM. The lifeboat museum has a new exhibit: the brass bell of the steamer Cassandra, which sank off the point in \
1887 and was raised by divers last summer. Children may ring it at noon. The museum shop sells postcards and maps.

FOR SALE. A wooden rowing boat, four metres long, painted blue, with two oars, 350 pounds. An upright piano in good \
condition, 120 pounds. Firewood, delivered to the house, 45 pounds a load. Ask at the hardware shop in Mill Lane.

THANKS. The crew of the lifeboat thank everyone who came to the harbour fair. It raised 1,900 pounds for a new engine.
"""

# Each with the words by which a right answer is known. With dense attention the language model answers these rightly;
# it has 135 million parameters, and fails at many others.
QUESTIONS = (
    ("What is the ferry called?", "Morning Star"),
    ("How much does a return ticket for the ferry cost?", "6 pounds"),
    ("What did the children of the primary school plant?", "240 apple trees"),
    ("Where does the fish market move to?", "Station Square"),
    ("How can the harbour master be reached?", "555 0173 day"),
    ("What is the name of the lost cat?", "Pepper"),
    ("Where does the concert take place if it rains?", "town hall"),
    ("What does the museum shop sell?", "postcards and maps"),
    ("What colour is the wooden rowing boat?", "blue"),
    ("What did the harbour fair raise?", "1,900 pounds"),
)

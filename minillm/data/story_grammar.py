"""The words of the short stories, in the notation of `grammar`: data only, read once by `stories`.

A story opens (who, where, what the hero likes), comes to a day and a place, turns into one of seven shapes (lost,
saving, sharing, rescue, mending, afraid, growing), and ends by what happened. Each list must let a reader tell its
options apart from left to right (no "hat" beside "hatchet"); a test proves that it holds.
"""

GRAMMAR = '''
story
    {opening} {likes} {day} {shape} {closing}

opening
    4 Once upon a time there (2 was|lived) {a trait=traits} {kind=kinds} (2 named|called) {hero=name}. {home}
    3 Long ago, {in_home}, there was {a trait=traits} {kind=kinds} (2 named|called) {hero=name}.
    3 {hero=name} was {a trait=traits} {kind=kinds} who lived {in_home}.
    2 In {a size} {home_kind} {by} {a size} {landmark} lived {a trait=traits} {kind=kinds} (2 named|called) {hero=name}.
    1 Everyone (2 in the village|by the sea|in the valley|in the street) knew {hero=name}, the {trait=traits} {kind=kinds}. {home}

home
    3 {hero.He} lived {in_home}.
    1 {hero.His} home was {a size} {home_kind} {by} {a size} {landmark}.

in_home
    in {a size} {home_kind} {by} {a size} {landmark}

by ~ beside, near, behind, under, opposite

home_kind ~ house, cottage, hut, cabin, barn, tower, tent, burrow

landmark ~ oak, hill, mill, bridge, lake, church, school, well, bakery, wall, orchard, station, fountain, lighthouse, gate, haystack

size ~ small, little, old, big, tiny, quiet, round, long, wide, narrow, crooked, wooden, bright, dusty, high, low, grey, green, pretty, plain, funny, sunny, empty, famous

hue ~ red, blue, green, yellow, white, black, brown, golden, orange, silver, purple, pink, grey, striped, spotted, shiny

name: he him his himself
    4 Lily, Mia, Anna, Rosa, Nina | she | her | her | herself
    2 Ella, Zoe, Ivy, Mei, Priya, Clara, Sofia, Hana, Amina, Ruth | she | her | her | herself
    4 Ben, Tom, Sam, Leo, Max | he | him | his | himself
    2 Finn, Hugo, Omar, Kofi, Otto, Yusuf, Jonas, Ravi, Pavel, Noah | he | him | his | himself

kinds
    16 child
    5 rabbit
    4 fox
    4 mouse
    4 bear
    3 otter
    3 badger
    2 beaver
    2 goat
    2 mole
    2 panda
    2 tortoise
    1 raccoon
    1 penguin
    1 lamb
    1 wolf

traits ~ kind, brave, curious, shy, clever, cheerful, quiet, patient, careful, gentle, stubborn, lively, honest, polite, dreamy, busy, merry, sleepy, hopeful, playful, forgetful, tidy, noisy, thoughtful

likes
    4 {hero.He} (4 liked|3 loved|enjoyed) {pastime=pastimes}, and {like_more}.
    2 Most of all {hero.he} (2 liked|loved|enjoyed) {pastime=pastimes} and {treat}.
    2 What {hero.he} (2 liked|loved) best was {pastime=pastimes}, and {like_more}.
    2 Every {daytime} {hero.he} spent (2 an hour|some time) {pastime=pastimes}, and {like_more}.

like_more
    3 {hero.he} (3 always|often|sometimes) wore {a hue} {wear}
    2 {hero.his} favourite food was {treat}
    2 {hero.he} (2 kept|had) {a hue} {pocket_thing} in {hero.his} pocket
    1 {hero.he} could (2 name|draw) {number} (2 kinds|sorts) of {tree}

pastimes ~ drawing maps, singing songs, picking berries, reading stories, climbing trees, counting stars, baking bread, painting stones, telling jokes, skipping rope, feeding birds, building towers, making soup, watching clouds, chasing leaves, collecting buttons, playing chess, learning words, sailing boats, planting beans, whistling tunes, jumping puddles, rolling hoops, knitting socks, catching moths, writing letters

treat ~ warm bread, apple pie, honey cake, plum jam, bean soup, nut bread, cold milk, berry tart, roast corn, pancakes, noodles, rice with peas, carrot stew, cheese, pears, dumplings, lemon tea, porridge, melon, fried eggs

wear ~ scarf, hat, coat, apron, belt, ribbon, jacket, vest, cape, bow, shirt, glove, waistcoat, collar

pocket_thing ~ button, stone, pencil, marble, feather, coin, thread, whistle, shell, acorn, key, bead, nail, card

tree ~ trees, flowers, clouds, apples, bees, boats, birds, stones, knots, stars, ferns, cheeses

daytime ~ morning, evening, afternoon, night, summer, spring, winter, autumn, Sunday, Monday, Friday

weather ~ sunny, windy, cold, warm, rainy, foggy, bright, cloudy, quiet, grey, hot, fresh, stormy, frosty, misty, mild, damp, golden

day
    6 One {weather} {time}, {hero.he} {went} {place=places} {with_what}. {sight}
    2 On {a weather} {time} {hero.he} {went} {place=places} {with_what}. {sight}
    2 {Weather} days were the best for {place=places}, so one {weather} {time} {hero.he} {went_there} {with_what}. {sight}
    1 It was {a weather} {time} when {hero} {went} {place=places} {with_what}. {sight}

time ~ morning, afternoon, day, evening, Saturday, Tuesday, Thursday, holiday

went ~ went to, walked to, ran to, set out for, hurried to, skipped to, strolled to, hopped to

went_there ~ went there, walked there, ran there, set out, hurried there, strolled over, marched off

with_what
    3 with {a hue} {carry}
    2 to {errand}
    2 after {meal}
    1 (2 all alone|before anybody else|by a new path|by the shortest way|along the old wall)

carry ~ basket, bag, bucket, umbrella, blanket, book, lamp, sack, jar, rope, cart, box, cup, drum, net, broom

errand ~ look for mushrooms, buy a loaf, meet the postman, stretch {hero.his} legs, breathe the fresh air, see what was new, deliver a letter, sketch the view, learn a new song, visit an aunt, test {hero.his} new shoes, hear the band, find a quiet corner

meal ~ breakfast, lunch, a bowl of soup, tea, two slices of toast, an early supper, a long nap, sweeping the floor, watering the plants, a lesson about numbers, washing the cups

places: on sight spot goods
    3 the beach | on the beach | beach_sight | beach_spot | shells
    3 the forest | in the forest | forest_sight | forest_spot | acorns
    3 the market | at the market | market_sight | market_spot | plums
    3 the river | by the river | river_sight | river_spot | pebbles
    2 the park | in the park | park_sight | park_spot | chestnuts
    2 the farm | at the farm | farm_sight | farm_spot | eggs
    2 the meadow | in the meadow | meadow_sight | meadow_spot | daisies
    2 the harbour | at the harbour | harbour_sight | harbour_spot | corks
    1 the orchard | in the orchard | orchard_sight | orchard_spot | apples
    1 the library | at the library | library_sight | library_spot | bookmarks

sight
    4 {place.On} {hero.he} (4 saw|2 passed|counted|noticed|greeted|watched) {number} {size} {@place.sight} and {a hue} {odd}.
    2 There were {number} {size} {@place.sight} {place.on}, and {a weather} wind (2 blew|sang|played) (2 around|between|over) them.
    2 {Number} {size} {@place.sight} were (3 there already|talking loudly|fast asleep|having lunch), and {hero.he} (2 smiled at|waved to|nodded at|sat down near) them.
    2 The air {place.on} smelled of {smell} and {smell_too}, and {size} {@place.sight} (2 were everywhere|came and went|stood about).

smell ~ flowers, grass, salt, smoke, honey, rain, wood, mint, soap, hay, paint, apples, moss, tar

smell_too ~ wet earth, fresh bread, old leaves, wool, warm stone, soup, roses, sawdust, onions, clover

number ~ two, three, four, five, six, seven, eight, nine, ten, twelve

beach_sight ~ gulls, crabs, children, boats, dogs, swimmers, fishermen, starfish, kites

forest_sight ~ deer, jays, pine trees, ferns, woodcutters, beetles, mushrooms, spiders, foxgloves

market_sight ~ carts, farmers, stalls, bakers, hens, dancers, barrels, pigeons, sailors

river_sight ~ ducks, swans, frogs, rafts, herons, dragonflies, willows, anglers, geese

park_sight ~ benches, pigeons, gardeners, joggers, roses, twins, poodles, statues, lamps

farm_sight ~ cows, pigs, hens, horses, scarecrows, ploughs, calves, sheep, milk cans

meadow_sight ~ butterflies, bees, cows, poppies, larks, rabbits, hay wagons, grasshoppers, shepherds

harbour_sight ~ ships, sailors, gulls, cranes, anchors, tugboats, ropes, crates, seals

orchard_sight ~ ladders, wasps, pickers, baskets, starlings, beehives, pear trees, wagons, goats

library_sight ~ shelves, readers, globes, desks, cats, clocks, stools, students, portraits

beach_spot ~ behind a sandcastle, under a towel, in a rock pool, beside the steps, under a rowing boat, among the seaweed

forest_spot ~ behind a log, under the ferns, in a hollow tree, beside an anthill, among the pine needles, under a thorn bush

market_spot ~ behind the fish stall, under a table, in a heap of cabbages, beside the fountain, among the pots, under a cart

river_spot ~ behind the willow, under the bridge, in the reeds, beside the ferry, among the stones, under a fishing net

park_spot ~ behind the statue, under a bench, in the sandpit, beside the swings, among the roses, under the bandstand

farm_spot ~ behind the barn, under the wagon, in the hay, beside the pigsty, among the pumpkins, under the hen house

meadow_spot ~ behind a haystack, under a fence, in a ditch, beside a molehill, among the poppies, under a blackberry bush

harbour_spot ~ behind the crates, under a sail, in a coil of rope, beside the lighthouse, among the barrels, under the pier

orchard_spot ~ behind a ladder, under an apple tree, in a wheelbarrow, beside the beehives, among the baskets, under a heap of leaves

library_spot ~ behind the atlas, under a desk, in the coat room, beside the globe, among the fairy tales, under a cushion

odd ~ feather, button, leaf, cup, spoon, snail, beetle, ribbon, glove, bottle, key, moth, cushion, pebble, candle, flag, boot, plate, stamp, wheel, string, sock

shape
    4 ¶ {lost}
    4 ¶ {saving}
    3 ¶ {sharing}
    3 ¶ {rescue}
    3 ¶ {mending}
    3 ¶ {afraid}
    3 ¶ {growing}

friend_name: he him his
    3 Pip, Bruno, Rufus, Gus, Basil, Moss | he | him | his
    1 Duncan, Oscar, Albert, Wilbur, Chester | he | him | his
    3 Nell, Daisy, Hazel, Tilly, Pearl, Juno | she | her | her
    1 Wanda, Flora, Maud, Velvet, Greta | she | her | her

friend_animal ~ squirrel, hen, cat, dog, turtle, crow, donkey, sparrow, goose, pony, frog, robin, swan, lizard, magpie, weasel

meet
    4 Just then {a friend_kind=friend_animal} (2 named|called) {friend=friend_name} {came} with {a hue} {friend_carry}.
    3 {hero.His} friend {friend=friend_name} the {friend_kind=friend_animal} {came} with {a hue} {friend_carry}.
    2 Along came {friend=friend_name}, {a size} {friend_kind=friend_animal} with {a hue} {friend_carry}.
    1 Not far away, {friend=friend_name} the {friend_kind=friend_animal} was {friend_busy}.

came ~ came by, stopped, passed by, arrived, turned up, came running, walked over, looked in

friend_carry ~ bag, hat, basket, scarf, umbrella, bicycle, broom, pipe, teapot, parcel, fiddle, newspaper, balloon, lunch box

friend_busy ~ eating {treat}, reading a newspaper, sweeping the path, humming a tune, mending a net, sorting nuts, taking a nap, hanging up socks, polishing a bell, painting a door

ask
    3 "What is (2 wrong|the matter)?" (4 asked|said) {friend}.
    3 "Why do you look so (2 sad|worried|cross|lost)?" (4 asked|said) {friend}.
    2 "Can I help (2 you|a bit|with anything)?" (4 asked|said) {friend}.
    1 "{hero}, {tell_me}," {said} {friend}.

tell_me ~ tell me all about it, you are not smiling today, sit down and breathe, I heard you from the road

said ~ said, answered, replied, called, laughed, whispered, cried, sang, smiled

sadly
    5 {hero} {sad_said}.
    2 {sad_said} {hero}.

sad_said ~ moaned, sighed, whispered, said, answered, sobbed, replied, mumbled

cheer
    3 "Do not (2 worry|cry|give up)," {said} {friend}. "{We_can}."
    3 "{We_can}," {said} {friend}.
    2 {friend} thought for a (3 moment|minute|while|breath). "{We_can}," {friend.he} {said}.

we_can ~ we can do it together, let us try together, two can do more than one, I have an idea, I will help you, four eyes see more than two, we only need some time, I know what to do

lost
    But then {hero.he} (3 stopped|stood still|turned pale|felt in {hero.his} bag). {hero.His} {colour=hue} {thing=things} was {shape:lost} (4 gone|missing|not there)! It (2 had been|was) a (2 present|gift) from {hero.his} {relative=family}, and {hero} {thing.did} every {daytime}. {search} {then_search} {meet} {ask} "I (3 lost|cannot find|miss) my {colour} {thing}," {sadly} {cheer} {found}

things: use did
    3 kite | fly it | flew it
    3 ball | throw it | threw it
    2 drum | play it | played it
    2 toy boat | sail it | sailed it
    2 book | read it | read it
    2 scarf | wear it | wore it
    2 bell | ring it | rang it
    2 whistle | blow it | blew it
    2 lantern | light it | lit it
    1 spade | dig with it | dug with it
    1 paintbrush | paint with it | painted with it
    1 spinning top | spin it | spun it
    1 mug | drink from it | drank from it
    1 wagon | pull it | pulled it
    1 hoop | roll it | rolled it
    1 umbrella | open it | opened it

family ~ grandmother, father, mother, uncle, aunt, sister, brother, grandfather, cousin, neighbour

search
    4 First {hero.he} looked {@place.spot}, but {only_found}.
    3 {hero.He} (3 searched|looked|felt about) {@place.spot} first, but {only_found}.
    2 {hero.He} {asked_one}, but nobody had seen it.

only_found
    4 (3 there was only|2 found only|saw nothing but|out came) {a hue} {odd}
    1 (2 it was not there|found nothing|nothing was there|it was too dark to see)

asked_one
    asked (2 the|some) {number} {@place.sight} (2 politely|one by one|twice|in a loud voice|with a small voice)

then_search
    3 Then {hero.he} (2 tried|looked) {near_spot}, but {only_found}.
    2 {hero.He} (2 even looked|crawled|peeped) {near_spot}, and {hero.he} got (2 mud|dust|cobwebs|water) on {hero.his} {wear}.
    2 After {number} (3 minutes|hours|tries) {hero.he} sat down {near_spot} and (3 wanted to cry|began to cry|counted to ten|rubbed {hero.his} eyes).

near_spot ~ by a wall, near the road, at the corner, by a puddle, inside a barrel, over the hedge, round the bend, on the stairs, at the gate, by a post

found
    3 They (3 searched|walked|looked) {how}, and (2 at last|soon|in the end) {friend} (3 pointed|looked up|called out|jumped). The {thing} was {hidden}! {found_end}
    2 {friend} (2 climbed|stood) on {a size} {stand_on} and looked around {how}. "There it is, {hidden}!" {friend.he} {said}. {found_end}
    1 "When did you {thing.use} last?" asked {friend}. Then {hero} remembered. They ran back, and there was the {thing}, {hidden}. {found_end}

how ~ together, slowly, everywhere, hand in hand, step by step, carefully, for an hour, side by side, without a word, high and low

stand_on ~ box, stone, wall, chair, stump, barrel, ladder, bucket

hidden ~ high in a tree, under a sleeping dog, behind a milk can, inside an empty nest, on top of a roof, between two stones, in a baby's pram, on the back of a cow, under a heap of straw, in the mouth of a goat, round a lamp post, in a puddle, behind a pile of bricks, on a scarecrow, in a window, under a wheel

found_end
    3 {hero} hugged {friend}, and they took turns to {thing.use} until (3 dark|supper|it rained|the moon rose).
    2 "(2 Thank you|You found it)!" {said} {hero}, and (2 let|asked) {friend} to {thing.use} first.
    2 {hero} was so (3 happy|glad|pleased) that {hero.he} {thing.did} {number} times, and {friend} (2 cheered|clapped|danced|counted).

saving
    In a shop window {hero} saw {a colour=hue} {thing=things} {shape:saving}. It cost {price=total} coins, and {hero.he} had (3 none|no money|only {a hue} {odd}). {hero} (3 wished|longed|wanted) to {thing.use} (2 more than anything|very much|that very {daytime}), so {hero.he} {looked_for_work}. {hero.He} {chore} for {boss=employer} and got {first=@price.part} coins. {but_not} {meet} {ask} "I am saving for the {colour} {thing}," {sadly} {cheer} Together they {chore_too}, and {boss_too} gave them {- price first} more coins. {adds_up} {bought}

total: part
    3 five | part_five
    3 six | part_six
    3 seven | part_seven
    2 eight | part_eight
    2 nine | part_nine
    2 ten | part_ten
    1 eleven | part_eleven
    1 twelve | part_twelve

part_five ~ two, three

part_six ~ two, three, four

part_seven ~ three, two, five, four

part_eight ~ two, three, four, five, six

part_nine ~ three, two, four, five, six, seven

part_ten ~ five, two, three, four, six, seven, eight

part_eleven ~ two, three, four, five, six, seven, eight, nine

part_twelve ~ two, three, four, five, six, seven, eight, nine, ten

looked_for_work ~ looked for work, decided to earn them, put on an apron, knocked at every door, rolled up both sleeves, asked around

chore ~ swept the yard, fed the hens, carried wood, washed windows, picked beans, folded letters, pulled weeds, held the horses, watered the roses, peeled potatoes, wound wool, dusted the shelves, brushed the dog

chore_too ~ stacked bricks, painted a fence, milked the cows, sorted apples, scrubbed pots, carried parcels, raked leaves, shelled peas, chopped onions, cleaned boots, dug a ditch, polished spoons, sold lemonade

employer ~ the baker, the miller, the teacher, an old sailor, the tailor, a farmer, the postman, the doctor, a painter, the blacksmith, the clockmaker

boss_too ~ the butcher, a kind widow, the mayor, a tired cook, the gardener, a fisherman, the weaver, the judge, a musician, the innkeeper

but_not
    3 That was not enough.
    2 "Not enough," thought {hero}.
    2 {hero} counted them {number} times, but there were still only {first}.

adds_up
    4 "{First} and {- price first} make {price}," {said} (2 {hero}|{friend}).
    2 {hero} counted: {first} and {- price first} are {price}. "That is enough!" {hero.he} {said}.
    2 "{First} plus {- price first} is {price}!" {said} (2 {hero}|{friend}).

bought
    3 So {hero} bought the {thing}, and (2 {friend}|both of them|they) (2 could|learned to|was the first to) {thing.use} {how}.
    2 The shopkeeper (2 wrapped|packed|put) the {thing} in {hue} paper, and {hero} {carried_home}.
    2 They ran to the shop {how}. {hero} paid, took the {thing} and {thing.did} right there, and {number} (2 people|children|neighbours) clapped.

carried_home ~ carried it home, held it tight, hugged it all the way, showed it to {boss}, danced out of the door, let {friend} hold it

sharing
    Under {a size} (3 tree|bush|bench|rock|bridge) {hero} found {shape:sharing} {many=total} {colour=hue} {place.goods}. {hero.He} {gather} and {gladly}. {meet} {friend.He} {looked_at}. "I have (2 no|not found any) {place.goods} today," {said} {friend}. "{need_them}." {hero} {thought}. {gave} {thanks} {treat_back}

gather ~ put them in {hero.his} hat, laid them in a row, washed them one by one, tied them in a cloth, made a little heap, rolled them in a leaf, hid them in {hero.his} sleeve, dried them in the sun

gladly ~ felt rich, sang a little song, jumped for joy, smiled from ear to ear, could hardly believe it, wanted to keep them all, whistled loudly, thought of supper

looked_at ~ looked at the heap, looked hungry, looked at the ground, stared and swallowed, rubbed {friend.his} eyes, sat down with a sigh, had an empty bag

need_them ~ My sister is ill and wanted some, It is my birthday tomorrow, I walked all day for nothing, The wind took mine, I wanted to make a necklace, I need them for a soup, A thief took mine, I dropped mine in the water

thought ~ looked at the heap for a while, thought of {hero.his} {family}, did not like to share at first, remembered a hungry day, scratched one ear, took a deep breath, nodded slowly, blushed a little, began to count

gave
    4 {hero.He} gave {friend} {given=@many.part} of the {many} {place.goods}. "{Many} take away {given} is {- many given}," {hero.he} {said}.
    2 "Take {given=@many.part} of my {place.goods}," {said} {hero}, "then I still have {- many given}."
    2 {hero.He} pushed {given=@many.part} of them over to {friend} and kept {- many given}. "{Given} and {- many given} make {many}, so none are lost," {hero.he} {said}.

thanks
    3 {friend} (3 beamed|jumped up|bowed|blushed|clapped). "(2 Thank you|How kind|You are a friend)!" {friend.he} {said}.
    2 "Nobody ever (2 shared with|gave anything to|listened to) me (2 before|so kindly)," {said} {friend}.

treat_back
    3 {friend.He} (2 took|pulled) {a hue} {friend_carry_too} out of {friend.his} bag: there was {treat} for (2 both of them|two).
    2 (2 The next|Another) {time} {friend} came back with {treat} and {a hue} {odd} for {hero}.
    2 Then {friend} showed {hero} a place {near_spot} with even more {place.goods}.

friend_carry_too ~ tin, pot, cloth, bottle, napkin, jar, lunch box, paper bag

rescue
    Suddenly {hero.he} heard a {weak} (3 cry|voice|squeak|sob) {shape:rescue}. {A size} {creature=small_animal} was (3 stuck|caught|trapped) {trap=tight_place}. "{Help_me}!" {creature_said} the {creature}. {hero} {try_one}, but {try_failed}. {hero.He} {try_two}, but {try_failed_too}. {meet} {ask} "The {creature} is stuck {trap}," {sadly} {cheer} {freed} {reward}

weak ~ weak, faint, thin, soft, sad, tired, hoarse, frightened, sharp, strange

small_animal ~ bird, hedgehog, kitten, lamb, duckling, bat, toad, butterfly, calf, piglet, chick, owl, newt

tight_place ~ in a thorn bush, under a heavy branch, in a fishing net, between two rocks, in a muddy hole, inside a bottle, in a drain, behind a locked gate, on a thin ledge, under a fallen fence, in sticky tar, in a chimney

help_me ~ help me, please help, oh dear, I want my mother, somebody help, get me out, I am so tired, please hurry

creature_said ~ cried, called, whispered, sobbed, begged, said, squeaked

try_one ~ pulled with both hands, pushed with a stick, pulled gently, blew and blew, shook everything, dug with a spoon, called for {number} minutes, tugged at a rope, used {a hue} {pocket_thing}

try_failed ~ nothing moved, it was too heavy, it was too tight, it slipped, that only made a noise, the stick broke, it hurt the {creature}

try_two ~ tried again from below, asked {number} ants for help, fetched some water, sang to calm it, lay down flat and reached out, leaned on it hard, made a hook of wire, tied a knot

try_failed_too ~ it was no use, the mud was too deep, it would not move, {hero.he} was not strong enough, the knot came loose, {hero.his} arms were too short

freed
    3 {friend} held {a size} {tool} and {hero} (3 pulled|pushed|lifted). "One, two, three!" they (2 cried|counted|shouted), and the {creature} was free.
    2 {friend} fetched {a size} {tool}. They worked {how} for {number} minutes, and then the {creature} (2 was free|hopped out|rolled out).
    2 With {a size} {tool} and {number} (2 strong pulls|careful pushes|little steps) they (2 freed|saved) the {creature}.

tool ~ rope, ladder, pole, saw, spade, bucket, hook, plank, blanket, lever, broom, crowbar

reward
    3 "Thank you, {hero} and {friend}," {creature_said} the {creature}, and gave them {a hue} {odd}.
    2 The {creature} {creature_did}, and its (2 mother|family) (2 invited them for|brought them|made them) {treat}.
    2 (2 The next|Every) {daytime} the {creature} came to {hero.his} (2 window|door|garden) with {a hue} {odd}.

creature_did ~ shook itself, laughed, turned round twice, bowed, blinked, sneezed, danced

mending
    There was trouble, for {shape:mending} {storm} and the {broken=broken_thing} was broken. {Nobody}, and {number} {size} {@place.sight} stood waiting. "Somebody should mend it," {said} {hero}. {hero.He} tied it with {stuff=weak_stuff}, but {fell_apart}. {hero.He} tried {stuff_too}, but {fell_apart_too}. {meet} {ask} "The {broken} will not hold," {sadly} {cheer} "{Not_like_that}," {friend.he} added, "we need {strong=strong_stuff}." {they_fix} {fixed_end}

storm ~ the wind had blown all night, a cart had hit it, it had rained for days, it was very old, a cow had leaned on it, the frost had bitten it, a branch had fallen

broken_thing ~ bridge, gate, swing, fence, ladder, seesaw, boat, wheel, roof, bench, cart, sign, pump

nobody ~ nobody could get by, no one knew what to do, people shook their heads, everyone was cross, all the games had stopped, some began to shout

weak_stuff ~ grass, string, a ribbon, wet paper, thread, straw, a sock, ivy, wool

fell_apart ~ it fell apart, it broke at once, it held for only {number} minutes, a crow flew off with it, a gust blew it away, it came undone

stuff_too ~ mud, glue, honey, paste, sticks, wax, jam, sand, clay

fell_apart_too ~ it would not stick, {hero.he} got (2 dirty|stuck|sticky) {hero.himself}, that made it worse, ants came and ate it, the rain washed it off, it bent and cracked

not_like_that ~ not like that, nearly right, that is too weak, good try, you were on the right track, one thing is missing

strong_stuff ~ nails and a hammer, strong rope, long boards, iron wire, two thick poles, a big bolt, leather straps, screws, a new beam

they_fix
    3 {hero} held the {broken}, and {friend} worked with {strong} {how}.
    2 They {fetched} {strong} from {employer} and worked {how}.
    2 {friend} showed {hero} how to use {strong}, and {hero.he} did it {how}.

fetched ~ borrowed, fetched, got, bought, begged

fixed_end
    3 Then {number} (2 people|children|neighbours) {tested}, and the {broken} held.
    2 When the {broken} was {good_as_new}, everybody {cheered}.
    2 {Employer} came to see the {broken} and gave them {treat}.

tested ~ tried it, jumped on it, pulled at it, looked at it from all sides, sat down on it, used it

good_as_new ~ as good as new, finished, stronger than before, painted {hue}, mended, whole again

cheered ~ cheered, clapped, danced, threw up their hats, sang, had {treat}, shook hands

afraid
    Only one thing made {hero.him} (2 unhappy|shiver|stop) {shape:afraid} : {hero.he} was afraid of {fear=fear_of}. And {place.on}, {just_now}, {fear.sign}. {hero} {shook} and {hid} {@place.spot}. {meet} {ask} "I am afraid of {fear}," {sadly} "(3 So was I|Everybody is afraid of something|My {family} was too)," {said} {friend}. "{trick=Good_trick}." {hero} {tried_it}. {step_one} {step_two} {brave_end}

fear_of: sign
    3 the dark | the sun went behind a black cloud
    3 thunder | the sky began to rumble
    2 deep water | the only way home led through a stream
    2 big dogs | a huge dog lay across the path
    2 high places | the path went up to a steep cliff
    2 strangers | a tall man with a beard came nearer
    1 geese | a goose hissed from the grass
    1 loud drums | the band started to play
    1 spiders | a spider came down on its thread
    1 caves | everyone wanted to look into the cave

just_now ~ just then, all at once, that very minute, as it happened, without any warning, of all days

shook ~ shook, turned white, gave a cry, held {hero.his} breath, dropped everything, shut both eyes, trembled, gulped

hid ~ hid, crouched, crept away, lay down, sat, crawled

good_trick: did
    3 count slowly to ten | counted aloud
    2 hold my hand tight | held on tight
    2 sing a song with me | sang a song
    2 breathe in and out | breathed in and out
    2 think of something good | thought of good things
    1 look at it closely | looked very closely
    1 give it a funny name | chose a funny name
    1 tell it to go away | spoke in a firm voice

tried_it ~ tried it, nodded, swallowed, opened one eye, stood up, came out, wanted to run but stayed

step_one
    3 {hero.He} {trick.did} once, and {hero.his} (3 knees|hands|ears|teeth) (2 stopped shaking|felt warmer|were still).
    2 The first time {hero.he} {trick.did}, (3 it did not help|nothing happened|{hero.his} voice was thin).

step_two
    3 The {nth} time {hero.he} {trick.did}, it was (3 easier|almost easy|not so bad|nearly fun).
    2 Then {friend} and {hero} {trick.did} together, {number} times.

nth ~ second, third, fourth, fifth, sixth, seventh

brave_end
    3 "{Fear} (2 cannot hurt me|will not stop me|can wait)," {said} {hero}, and {hero.he} {walked_on}.
    2 When it was over, {hero} {laughed_at}. "I did it!" {hero.he} {said}.
    2 {hero} was still a little afraid of {fear}, but now {hero.he} knew what to do, and {hero.he} {walked_on}.

walked_on ~ walked on, took {number} steps forward, went first, laughed, waved, danced in a circle, stood up straight

laughed_at ~ laughed, looked surprised, took a bow, hugged {friend}, sat down in the grass, asked for {treat}

growing
    That {daytime} {hero.he} (3 found|was given|bought|picked up) {shape:growing} {a colour=hue} seed {near_spot}. "What will you be?" {hero.he} {said}, and {planted} in {a size} {pot}. {hero.He} watered it every {daytime} and {waited}, but after {days=number} days {nothing_yet}. {meet} {ask} "My seed does not grow," {sadly} "{needs=Seed_needs}," {said} {friend}. {they_help} {grew}

planted ~ put it, laid it, planted it, hid it, tucked it, pressed it

pot ~ pot, box, bucket, bowl, garden bed, tin, teacup, barrel, basket, boot

waited ~ waited, sang to it, read to it, looked at it {number} times, told it stories, drew it, talked to it, asked it to hurry

nothing_yet ~ nothing had come up, there was only earth, not one leaf could be seen, only {a hue} {odd} lay there, it still slept

seed_needs: did
    3 it needs more sun | carried it into the sun
    3 it needs time | waited together
    2 it is too cold there | put a blanket round it
    2 you give it too much water | let the earth dry
    2 the earth is too hard | dug the earth loose
    1 the birds are too near | made a little scarecrow
    1 it wants company | planted beans beside it

they_help
    3 So they {needs.did}, and {friend} (3 came|looked in|visited) every {daytime} with {friend_busy_too}.
    2 They {needs.did} {how}, and then they (2 had|ate|shared) {treat}.

friend_busy_too ~ a watering can, a song, good advice, some dung, {treat}, {a hue} {odd}, a chair, warm rain water

grew
    3 {more_days} there was {a size} leaf, then {number} leaves, and then {a hue} {plant=plant_name} as tall as {hero}. {grew_end}
    2 One {weather} {daytime} the earth (2 moved|cracked|opened), and up came {a size} {plant=plant_name} with {number} {colour} leaves. {grew_end}

more_days
    3 {more=Number} days later
    1 After {more=number} more days

plant_name ~ sunflower, bean plant, pumpkin, rose, apple tree, tulip, melon, cherry tree, pea plant, lily, fig tree, poppy

grew_end
    3 {hero} gave {friend} the first {seed_gift}.
    2 "{Days} days and {more} days make {+ days more} days," {said} {friend}, "and every one was worth it."
    2 "You only needed a friend," {said} {hero} to the {plant}.

seed_gift ~ flower, leaf, fruit, seed, bud, blossom

closing
    3 ¶ {feel}, and {from_then}.
    2 ¶ That (3 night|evening) {hero} {told} {kin} about {friend}, and {from_then}.
    2 ¶ {hero} went home {weather_home} with {friend}. They ate {treat} {and_then}.
    2 ¶ {from_then_first}, and {hero}, the {trait} {kind}, {last_line}.
    1 ¶ "(2 What|That was) a {weather} day," {said} {hero}. "{A_wish}," {said} {friend}, and {from_then}.
'''

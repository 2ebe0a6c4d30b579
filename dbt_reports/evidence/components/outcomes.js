// What may come out for a pair and a method: sign, colour, meaning. The words are those of the mart `outcomes`.
export const OUTCOMES = {
	identified: ['✓', 'bg-positive/25', 'a change was asserted and the right one ranked first'],
	described: ['✎', 'bg-info/20', 'a change was asserted; there was no ranking'],
	'ranked first, not claimed': ['◐', 'bg-info/20', 'the right change ranked first, but nothing was asserted'],
	'wrong claim': ['✗', 'bg-negative/25', 'a change was asserted, but another one ranked first'],
	silent: ['–', 'bg-base-200', 'nothing was asserted'],
	undecided: ['?', 'bg-warning/20', 'too little evidence, or too few nulls, to judge'],
	'rightly silent': ['✓', 'bg-positive/10', 'nothing changed and nothing was asserted'],
	'false alarm': ['!', 'bg-negative/40', 'nothing changed, yet a change was asserted']
};

// Colours of a heatmap, as in the pictures of the web UI: from white to blue, and where values fall below zero to both sides
// of it, as far to one as to the other, so that white is no change.
export function scaleOf(rows, value) {
	const values = rows.map((row) => row[value]).filter((each) => typeof each === 'number' && !Number.isNaN(each));
	const bound = Math.max(...values.map(Math.abs), 0);
	return values.some((each) => each < 0)
		? { min: -bound, max: bound, colorScale: ['#93c5fd', '#f8fafc', '#fca5a5'] }
		: { min: 0, max: bound, colorScale: ['#f8fafc', '#93c5fd'] };
}

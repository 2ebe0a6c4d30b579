// Two repairs of Evidence's query engine; a text that is no longer there means that the pins changed: look again.
import { readFileSync, writeFileSync } from 'node:fs';

function edit(file, pattern, replacement) {
	const path = `node_modules/@evidence-dev/universal-sql/src/${file}`;
	const text = readFileSync(path, 'utf8');
	writeFileSync(path, text.replace(pattern, replacement));
}

// duckdb-wasm is pinned to 1.28.0 (DuckDB 0.9.1), the last one that reads Parquet without fetching an extension from
// another host. Evidence sets two options that it does not know; its defaults are the values that they ask for.
for (const runtime of ['node', 'browser']) {
	edit(`client-duckdb/${runtime}.js`, /^.*SET (ieee_floating_point_ops|old_implicit_casting) = .*\n/gm, '');
}

// A query without rows leaves no Parquet file, and the build then fails. Before anything is graded that is normal.
edit('build-parquet.js', 'if (currentBatch.length) await', 'if (currentBatch.length || !batchNum) await');

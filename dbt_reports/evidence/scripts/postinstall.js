// duckdb-wasm is pinned to 1.28.0 (DuckDB 0.9.1), the last one that reads Parquet without fetching an extension from
// another host. Evidence sets two options that this version does not know; without them its defaults are the same.
import { readFileSync, writeFileSync } from 'node:fs';

for (const runtime of ['node', 'browser']) {
	const file = `node_modules/@evidence-dev/universal-sql/src/client-duckdb/${runtime}.js`;
	const text = readFileSync(file, 'utf8');
	writeFileSync(file, text.replace(/^.*SET (ieee_floating_point_ops|old_implicit_casting) = .*\n/gm, ''));
}

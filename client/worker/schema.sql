-- One row for each prediction. `stems` is a JSON object that maps the names of stems to URLs.
CREATE TABLE IF NOT EXISTS jobs (
  replicate_id TEXT PRIMARY KEY,
  status TEXT NOT NULL,
  stems TEXT,
  error TEXT
);

-- The webhooks handled in the last minutes, so that none is handled twice.
CREATE TABLE IF NOT EXISTS deliveries (
  webhook_id TEXT PRIMARY KEY,
  sent_at INTEGER NOT NULL
);

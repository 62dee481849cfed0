-- The sample database: what a small chat application keeps.
-- Any PostgreSQL from 13 on, no extension. Load both files in one transaction:
--   psql -d project_chat_dev -1 -f db/sample/schema.sql -f db/sample/seed.sql

SET client_encoding = 'UTF8';

CREATE TABLE conversations (
    id          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title       text NOT NULL UNIQUE CHECK (title <> ''),
    status      text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'closed', 'archived')),
    started_by  text NOT NULL,
    tags        text[] NOT NULL DEFAULT '{}',
    settings    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    closed_at   timestamptz,
    CHECK ((status = 'open') = (closed_at IS NULL)),
    CHECK (closed_at >= created_at)
);
CREATE INDEX conversations_tags ON conversations USING gin (tags);
CREATE INDEX conversations_open ON conversations (created_at) WHERE status = 'open';

CREATE TABLE messages (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    conversation_id  integer NOT NULL REFERENCES conversations ON DELETE CASCADE,
    position         integer NOT NULL CHECK (position > 0),
    role             text NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
    content          text NOT NULL,
    token_count      integer CHECK (token_count >= 0),
    metadata         jsonb,
    attachment       bytea,
    embedding        real[],
    created_at       timestamptz NOT NULL DEFAULT now(),
    UNIQUE (conversation_id, position)
);
COMMENT ON COLUMN messages.embedding IS 'Unit-free floats, one array a message; NULL where nothing was embedded';
CREATE INDEX messages_created_at ON messages (created_at);
CREATE INDEX messages_metadata ON messages USING gin (metadata jsonb_path_ops);
CREATE INDEX messages_search ON messages USING gin (to_tsvector('english', content));

CREATE TABLE project_knowledge (
    id                      serial PRIMARY KEY,
    key                     text NOT NULL UNIQUE,
    category                text NOT NULL,
    content                 text NOT NULL,
    confidence              numeric(3, 2) NOT NULL CHECK (confidence BETWEEN 0 AND 1),
    source_conversation_id  integer REFERENCES conversations ON DELETE SET NULL,
    updated_at              timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE project_knowledge IS 'What the assistant should still know in the next conversation; the team''s own words';

CREATE TABLE conversation_index (
    conversation_id  integer PRIMARY KEY REFERENCES conversations ON DELETE CASCADE,
    last_message_id  bigint NOT NULL REFERENCES messages ON DELETE CASCADE,
    message_count    integer NOT NULL CHECK (message_count > 0),
    summary          text NOT NULL,
    keywords         text[] NOT NULL,
    embedding        real[] NOT NULL CHECK (cardinality(embedding) = 64),
    indexed_at       timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX conversation_index_keywords ON conversation_index USING gin (keywords);

-- Rows of the sample: 150 conversations, 3420 messages, 12 project_knowledge, 145 conversation_index.
-- Nothing here depends on the clock or on chance: every load gives the same rows.

SET client_encoding = 'UTF8';

-- 25 topics, each seen from 6 sides.
INSERT INTO conversations (title, status, started_by, tags, settings, created_at, closed_at)
SELECT topics[1 + (n - 1) % 25] || ' · ' || sides[1 + (n - 1) / 25],
       status,
       people[1 + n * 7 % 8],
       CASE WHEN n % 11 = 0 THEN '{}'
            ELSE ARRAY[labels[1 + n % 9], labels[1 + (n + 4) % 9]] END,
       CASE WHEN n % 5 = 0 THEN '{}'
            ELSE jsonb_build_object(
                'model', models[1 + n % 3],
                'temperature', round((n % 11) / 10.0, 1),
                'stop', CASE n % 4 WHEN 0 THEN NULL ELSE jsonb_build_array(E'\n\n', '"""') END) END,
       created_at,
       CASE WHEN status <> 'open' THEN created_at + interval '1 hour' * (2 + n % 50) END
  FROM (SELECT n,
               timestamptz '2024-09-02 07:30:00+00' + interval '23 hours' * n + interval '1 minute' * (n * 37 % 600) AS created_at,
               CASE WHEN n % 30 = 0 THEN 'open' WHEN n % 4 = 0 THEN 'archived' ELSE 'closed' END AS status
          FROM generate_series(1, 150) AS n) AS numbered,
       (SELECT ARRAY['Checkout page', 'Search ranking', 'Invoice e-mails', 'Café menu for spring', 'Zürich office move',
                     'Résumé parser', 'Password reset', 'Mobile navigation', 'Quarterly numbers', 'Onboarding tour',
                     'Отчёт за квартал', '東京チームの予定', 'صفحة الهبوط', 'Ελληνική μετάφραση', 'हिन्दी सहायता पृष्ठ',
                     'Release 2.4', 'Data retention', 'Dark mode', 'CSV import', 'Backups & restore',
                     'Vector search', 'Rate limits', 'Newsletter', 'Accessibility audit', 'Support macros'] AS topics,
               ARRAY['first ideas', 'open questions', 'review', 'bug hunt 🐛', 'what''s next?', 'looking back'] AS sides,
               ARRAY['Amélie', 'Jürgen', 'Siobhán O''Brien', 'さくら', 'Олег', 'ليلى', 'Priya', 'Tom "T.J." Jones'] AS people,
               ARRAY['design', 'backend', 'urgent', 'v2', 'customer, external', 'größe', 'идея', '設計', 'back\slash'] AS labels,
               ARRAY['small', 'medium', 'large'] AS models) AS words;

-- 2 to 44 messages in each conversation. A long one begins with instructions to the assistant; then the
-- person asks, the assistant answers, and now and then a tool has something to say.
INSERT INTO messages (conversation_id, position, role, content, token_count, metadata, attachment, embedding, created_at)
SELECT conversation_id,
       position,
       role,
       content,
       CASE WHEN role <> 'tool' THEN 1 + length(content) / 4 END,
       CASE role
           WHEN 'assistant' THEN jsonb_build_object('latency_ms', 200 + seed % 3000, 'finish_reason', 'stop',
                                                    'cited', jsonb_build_array(1 + seed % 12))
           WHEN 'tool' THEN '{"tool": "query", "ok": true, "rows": null}'
       END,
       CASE WHEN role = 'user' AND seed % 29 = 0
            THEN decode(repeat(md5(content) || '00ff5c0a', 1 + seed % 40), 'hex') END,
       CASE WHEN role IN ('user', 'assistant') THEN (
           SELECT array_agg((('x' || substr(md5(conversation_id || '/' || position || '/' || d), 1, 8))::bit(32)::integer
                             / 2147483648.0)::real ORDER BY d)
             FROM generate_series(1, 24) AS d) END,
       created_at + interval '95 seconds' * position + interval '1 second' * (seed % 60)
  FROM (SELECT conversation_id, position, role, seed, created_at,
               CASE role
                   WHEN 'system' THEN 'You are a colleague on the project “' || title || E'”.\nBe brief; say what you don''t know.'
                   WHEN 'tool' THEN E'id\tname\tshare\n1\t"north"\t0.25\n2\t\\N\t0.75\n'
                   WHEN 'user' THEN format(questions[1 + seed % 12], title)
                   ELSE format(answers[1 + seed % 12], title)
                        || CASE WHEN seed % 3 = 0 THEN '' ELSE ' ' || remarks[1 + seed / 12 % 8] END
               END AS content
          FROM (SELECT c.id AS conversation_id, c.title, c.created_at, position,
                       CASE WHEN position = 1 AND c.id * 23 % 43 > 20 THEN 'system'
                            WHEN position % 13 = 0 THEN 'tool'
                            WHEN position % 2 = 1 THEN 'user'
                            ELSE 'assistant' END AS role,
                       ('x' || substr(md5(c.id || ':' || position), 1, 7))::bit(28)::integer AS seed
                  FROM conversations AS c, generate_series(1, 2 + c.id * 23 % 43) AS position) AS numbered,
               (SELECT ARRAY['Where do we stand with “%s”?',
                             'Can you sum up “%s” in three lines?',
                             'I don''t see why the numbers differ. Do you?',
                             'Let''s try the second option. What could go wrong?',
                             'Here is what the customer wrote: "it worked on Monday, it doesn''t today".',
                             'Спасибо! А что будет, если база недоступна?',
                             'これは来週までに必要です。間に合いますか?',
                             'هل يمكننا تأجيل ذلك إلى الأسبوع القادم؟',
                             'Merci, c''est clair. Et côté accessibilité ?',
                             'Does it also hold for paths such as C:\data\new\table.csv?',
                             '👍 ship it',
                             'One more thing about %s: who decides?'] AS questions,
                       ARRAY['For “%s” three points are open; the first one blocks the others.',
                             'Short answer: yes, but not with today''s data.',
                             'The difference is the time zone: one report counts days in UTC, the other in Zürich.',
                             E'I would do it in this order:\n  1. measure\n  2. change one thing\n  3. measure again',
                             E'```sql\nSELECT title, count(*) AS "how many"\n  FROM conversations\n GROUP BY 1;\n```',
                             'Если сервер недоступен, запрос повторяется три раза, потом мы сообщаем об ошибке.',
                             'はい、木曜日までに草案を用意します。',
                             'نعم، لكن يجب إبلاغ الفريق أولاً.',
                             'Deux contrastes sont trop faibles (3,2:1 au lieu de 4,5:1), le reste est bon.',
                             E'Yes: a backslash is only a character there. A line holding just\n\\.\nis fine too.',
                             '🎉 Done. I left a note in the changelog.',
                             'That is for the team to say; I can prepare both versions of %s.'] AS answers,
                       ARRAY['Tell me if you want the details.',
                             'I am about 80 % sure of this.',
                             'It''s cheap to undo.',
                             'Καλή ιδέα, όμως χρειάζεται δοκιμή.',
                             'See also what we wrote in September.',
                             'यह अगले संस्करण में ठीक होगा।',
                             'None of this touches the invoices.',
                             'Naïve, perhaps, but it’s enough for now.'] AS remarks) AS words) AS written
 ORDER BY created_at + interval '95 seconds' * position, conversation_id, position;

INSERT INTO project_knowledge (key, category, content, confidence, source_conversation_id, updated_at)
SELECT key, category, content, confidence, source, timestamptz '2025-01-06 09:00:00+00' + interval '26 hours' * row_number() OVER ()
  FROM (VALUES
    ('currency',        'domain',   'Prices are kept in cents; the shop shows € first, then CHF.', 1.00, 1),
    ('time zone',       'domain',   'Reports count days in UTC. Anything else says so in its title.', 0.95, 9),
    ('tone',            'style',    'We write "you", never "the user". No exclamation marks.', 0.80, 10),
    ('languages',       'domain',   'English, français, русский, 日本語, العربية, ελληνικά, हिन्दी.', 1.00, 14),
    ('retention',       'policy',   'Messages are kept for 24 months, attachments for 6.', 0.90, 17),
    ('on call',         'team',     'Siobhán O''Brien on weekdays, Олег at weekends.', 0.70, NULL),
    ('import format',   'technical', E'CSV, UTF-8, tab or semicolon; a quote is doubled: "".\nEmpty means NULL.', 0.99, 19),
    ('restore drill',   'policy',   'First Monday of the month: restore last night''s backup, count the rows.', 1.00, 20),
    ('embedding',       'technical', '24 floats a message, 64 a conversation.', 1.00, 21),
    ('rate limit',      'technical', '60 requests a minute for each key; 429 beyond.', 0.85, 22),
    ('newsletter day',  'team',     'Thursday, 10:00 in Zürich.', 0.60, 23),
    ('mascot',          'team',     'A hedgehog 🦔. Nobody remembers why.', 0.10, NULL)
  ) AS facts (key, category, content, confidence, source);

-- Conversations that are still open are not indexed yet.
INSERT INTO conversation_index (conversation_id, last_message_id, message_count, summary, keywords, embedding, indexed_at)
SELECT c.id,
       m.last_id,
       m.message_count,
       format('%s asked about “%s”; %s messages, %s of them answers.', c.started_by, c.title, m.message_count, m.answer_count),
       regexp_split_to_array(lower(replace(c.title, ' · ', ' ')), ' +') || c.tags,
       (SELECT array_agg((('x' || substr(md5(c.title || d), 1, 8))::bit(32)::integer / 2147483648.0)::real ORDER BY d)
          FROM generate_series(1, 64) AS d),
       c.closed_at + interval '5 minutes'
  FROM conversations AS c
  JOIN (SELECT conversation_id, max(id) AS last_id, count(*) AS message_count,
               count(*) FILTER (WHERE role = 'assistant') AS answer_count
          FROM messages GROUP BY conversation_id) AS m ON m.conversation_id = c.id
 WHERE c.status <> 'open'
 ORDER BY c.id;

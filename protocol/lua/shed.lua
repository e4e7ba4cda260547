-- Drop cached answers, those that expire first: memory is needed, or the model is another one.
-- KEYS: live or leader. ARGV: P, how many at most -> how many there were
allow_when_full()
return forget_first(tonumber(ARGV[2]))

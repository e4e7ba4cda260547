-- End a push that can be no request: a dead letter, and one error result for its id.
-- KEYS: leader. ARGV: P, epoch ('' = a gateway's, of a name that nobody leads), entry id, retention, tenant, id, hash, channel, row, results, result,
--       dead letter fields...
-- -> 'rejected' | 'repeat' | 'duplicate' (an earlier push with this id and hash: only the dead letter is written).
-- An id that is another body's stays that one's; this entry is told its error all the same.
allow_when_full()
local epoch, entry, retention, tenant, id, hash = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local channel, row, results, result = ARGV[8], ARGV[9], ARGV[10], ARGV[11]
if epoch ~= '' and not is_leader(epoch) then return fenced('epoch') end
redis.pcall('XACK', P .. 'jobs', 'scheduler', entry)
if redis.call('XDEL', P .. 'jobs', entry) == 0 then return 'repeat' end
redis.pcall('XADD', P .. 'dead', 'MAXLEN', '~', '1000', '*', unpack(ARGV, 12))
if tenant ~= '' and id ~= '' then
  local idem = P .. 'idem:' .. tenant .. ':' .. id
  local found = redis.call('TYPE', idem).ok
  if found == 'string' and string.match(redis.call('GET', idem), '(%S+)$') == hash then return 'duplicate' end
  if found == 'none' then redis.call('SET', idem, '- ' .. hash, 'PX', retention) end -- else somebody else wrote there
end
if results ~= '' then
  redis.pcall('XADD', P .. 'results:' .. results, 'MAXLEN', '~', '10000', '*', 'result', result)
  redis.pcall('PEXPIRE', P .. 'results:' .. results, 86400000)
end
if channel ~= '' then redis.pcall(PUBLISH, P .. 'out:' .. channel, row) end
return 'rejected'

-- name: json_records
-- purpose: The JSON records that match a pattern, as rows; a damaged one is named by the error.
-- grain: one row per record
-- Not read_json: it takes five times as long for many small files, and by default it refuses the
-- record of a run with some 40,000 shards for its size.
select unnest(
    case
        when json_valid(content) then from_json(content, {structure})
        else error(filename || ' is damaged: it is not JSON.')
    end
)
from read_text({pattern})
